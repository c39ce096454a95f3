-- Which experiments are shown: `latest` is 1 for the latest submitted of each name, `current` also for those that differ
-- from it in their judges alone (`orch rejudge`), each judge's latest. They are never mixed in one ranking.
select
  e.key, e.name, e.submitted_at, e.complete,
  cast(e.key = first_value(e.key) over (partition by e.name order by e.submitted_at desc, e.key) as integer) as latest,
  cast(
    coalesce(e.answers, e.key)
      = first_value(coalesce(e.answers, e.key)) over (partition by e.name order by e.submitted_at desc, e.key)
    and e.key = first_value(e.key) over (
      partition by e.name, coalesce(e.answers, e.key), e.judges order by e.submitted_at desc, e.key
    )
  as integer) as current
from experiments e
order by e.submitted_at desc, e.key
