-- Results that were made with other package versions than the latest result was.
with latest as (
  select versions from nodes where status = 'have' and versions is not null order by started_at desc, key limit 1
),
now as (
  select j.key as package, j.value as version from latest, json_each(latest.versions) j
)
select
  then_.key as package,
  then_.value as version,
  now.version as latest,
  n.stage,
  n.label,
  n.started_at,
  substr(n.key, 1, 12) as key
from nodes n, json_each(n.versions) then_
join now on now.package = then_.key
where n.status = 'have' and then_.value is not now.version
order by package, n.started_at
