-- One row per setting and eval. Only rankable rows have a rank: first those whose transfer is significantly positive
-- after Holm's correction, then by signed transfer, so that a setting that moves the wrong way ends at the bottom.
-- `unit` is what a dose of 1 meant, averaged over seeds; null where doses are not calibrated. `current` is 1 for the
-- latest experiment of its name. The casts give computed columns a type, which filters of Datasette need.
select
  e.name as experiment,
  c.eval,
  cast(case when c.rankable then
    rank() over (
      partition by c.experiment, c.eval, c.rankable
      order by (c.significant and c.transfer > 0) desc, c.transfer desc nulls last
    )
  end as integer) as rank,
  c.label,
  c.transfer, c.ci_low, c.ci_high, c.p_holm, c.significant,
  c.delta_nll, c.specificity, c.dose,
  cast((select avg(t.unit) from trials t where t.experiment = c.experiment and t.group_key = c.group_key) as real) as unit,
  c.contrast, c.even,
  c.status, c.n_items, c.n_families, c.n_seeds, c.n_dropped, c.mde, c.notes,
  c.method, c.baseline, c.rankable, c.base, c.se, c.df, c.p, c.tests, c.even_se, c.delta_nll_se,
  c.specificity_low, c.specificity_high,
  c.versus_control, c.versus_control_low, c.versus_control_high, c.versus_control_p,
  c.eval_version, c.group_key,
  e.key as experiment_key,
  e.complete,
  e.submitted_at,
  cast(e.key = first_value(e.key) over (partition by e.name order by e.submitted_at desc, e.key) as integer) as current
from comparisons c
join experiments e on e.key = c.experiment
order by e.submitted_at desc, e.key, c.eval, rank nulls last, c.label
