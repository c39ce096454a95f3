-- What the results took, by stage and method: seconds of the work itself where the stage knows them, since answers
-- of many doses are made side by side.
select
  stage,
  coalesce(method, '') as method,
  count(*) as nodes,
  round(sum(coalesce(json_extract(outputs, '$.eval_seconds'), json_extract(outputs, '$.fit_seconds'), seconds)), 3)
    as seconds,
  round(avg(coalesce(json_extract(outputs, '$.eval_seconds'), json_extract(outputs, '$.fit_seconds'), seconds)), 3)
    as seconds_each,
  max(peak_rss_mib) as peak_rss_mib
from nodes
where status = 'have'
group by stage, coalesce(method, '')
order by seconds desc
