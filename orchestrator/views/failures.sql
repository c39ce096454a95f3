-- What failed, newest first, and which rows of a leaderboard have no rank, with the reason.
select
  'node' as kind,
  null as experiment,
  stage,
  label,
  'failed' as status,
  error as reason,
  attempts,
  started_at as at,
  substr(key, 1, 12) as key
from nodes
where status = 'failed'
union all
select
  'row',
  e.name,
  c.eval,
  c.label,
  c.status,
  c.notes,
  null,
  e.submitted_at,
  substr(c.group_key, 1, 12)
from comparisons c
join experiments e on e.key = c.experiment
where c.rankable = 0
order by at desc
