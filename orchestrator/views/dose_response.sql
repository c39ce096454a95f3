-- Every metric at every dose, averaged over seeds; at dose 0 every effect is 0 by definition.
select
  e.name as experiment,
  m.eval,
  s.label,
  s.method,
  m.metric,
  m.split,
  m.dose,
  m.value,
  m.se,
  m.n,
  m.n_clusters,
  m.group_key,
  e.key as experiment_key
from metrics m
join experiments e on e.key = m.experiment
join (select distinct experiment, group_key, label, method from trials) s
  on s.experiment = m.experiment and s.group_key = m.group_key
order by e.submitted_at desc, e.key, m.eval, s.label, m.metric, m.split, m.dose
