-- Confusion matrices in long form: one row per dataset's trait and measured name. `effect` is the mean over seeds and test
-- items at the chosen dose, against the control teacher's students where there are any; `own` marks the trait itself. `p`
-- is the permutation test's, for the whole matrix.
select
  e.name as experiment,
  c.eval,
  c.student,
  cast(trait.value as text) as trait,
  cast(name.value as text) as name,
  cast(json_extract(c.cells, '$[' || trait.key || '][' || name.key || ']') as real) as effect,
  cast(trait.value = name.value as integer) as own,
  c.excess, c.p, c.smallest, c.seeds,
  e.key as experiment_key
from confusions c
join experiments e on e.key = c.experiment
join json_each(c.traits) as trait
join json_each(c.names) as name
order by e.submitted_at desc, e.key, c.eval, c.student, trait.key, name.key
