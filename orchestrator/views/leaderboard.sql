-- One row per setting ("trial", its seeds together) and eval. Only rankable rows have a rank: first those whose transfer
-- is significantly positive after Holm's correction, then by signed transfer, so that a setting that moves the wrong way
-- ends at the bottom. `unit` is how large a dose of 1 was, averaged over seeds whatever their signs, and `flipped` how
-- many of them had their sign turned round by `calibrate: {orient: true}`; null where doses are not calibrated.
-- `reference` is the control whose score of the same seed and dose was taken off; null: the untouched subject.
-- `judged_by` says who judged the answers, `judge` is the digest of that with all its settings, `scoring` has the
-- thresholds; null: the task scored them itself. Each judge has a ranking of its own.
-- `current` is 1 for the latest experiment of its name, and for the judged evals of what differs from it in the judge
-- alone. The casts give computed columns a type, which filters of Datasette need.
select
  cast(case when c.rankable then
    rank() over (
      partition by c.experiment, c.eval, c.rankable
      order by (c.significant and c.transfer > 0) desc, c.transfer desc nulls last
    )
  end as integer) as rank,
  e.name as experiment,
  c.label as trial,
  c.method,
  cast((
    select json_extract(n.params, '$.settings')
    from trials t join nodes n on n.key = t.fit
    where t.experiment = c.experiment and t.group_key = c.group_key
    limit 1
  ) as text) as settings,
  c.eval,
  c.target,
  c.dose,
  cast((select avg(abs(t.unit)) from trials t where t.experiment = c.experiment and t.group_key = c.group_key) as real) as unit,
  cast((
    select sum(t.unit < 0) from trials t where t.experiment = c.experiment and t.group_key = c.group_key
  ) as integer) as flipped,
  c.transfer, c.ci_low as transfer_low, c.ci_high as transfer_high, c.contrast, c.even, c.p, c.p_holm, c.significant,
  c.mde, c.delta_nll, c.others, c.specificity,
  c.n_items as n, c.n_seeds as seeds, c.n_families as families, c.n_dropped as dropped,
  c.status, c.notes,
  c.reference,
  c.judged_by, c.scoring, c.judge, c.rubrics,
  c.baseline, c.rankable, c.base, c.se, c.df, c.tests, c.even_se, c.delta_nll_se,
  c.specificity_low, c.specificity_high, c.breadth, c.breadth_of, c.shifted,
  c.versus_control, c.versus_control_low, c.versus_control_high, c.versus_control_p,
  c.eval_version, c.group_key,
  e.key as experiment_key,
  e.complete,
  e.submitted_at,
  cast(case when c.judge is null then v.latest else v.current end as integer) as current
from comparisons c
join experiments e on e.key = c.experiment
join versions v on v.key = c.experiment
order by e.submitted_at desc, e.key, c.eval, rank nulls last, c.label
