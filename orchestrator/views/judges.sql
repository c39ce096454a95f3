-- What judges are worth: one row for each judge, rubric, kind of estimate, threshold, split and arm of its labelled
-- answers (`orch judge calibrate`). `slope` is by how much the judge moves when the truth moves by 1: J = TPR + TNR - 1
-- of verdicts, a regression's slope of scores. `refused` says why nothing may be corrected by a row, `arms_p` is the p
-- of the same errors in both arms. `current` is 1 for the latest of the same judge, rubric and answers' origin.
-- Formulas: docs/judges.md.
select
  cast(n.outputs ->> 'judge' as text) as judge,
  n.label as models,
  cast(r.value ->> 'role' as text) as role, cast(r.value ->> 'rubric' as text) as rubric,
  cast(r.value ->> 'kind' as text) as kind, cast(r.value ->> 'threshold' as real) as threshold,
  cast(r.value ->> 'split' as text) as split, cast(r.value ->> 'arm' as text) as arm,
  cast(r.value ->> 'n' as integer) as n, cast(r.value ->> 'positives' as integer) as positives,
  cast(r.value ->> 'questions' as integer) as questions, cast(r.value ->> 'unscored' as integer) as unscored, cast(r.value ->> 'mass' as real) as mass,
  cast(r.value ->> 'tpr' as real) as tpr, cast(r.value ->> 'tpr_low' as real) as tpr_low,
  cast(r.value ->> 'tpr_high' as real) as tpr_high, cast(r.value ->> 'tnr' as real) as tnr,
  cast(r.value ->> 'tnr_low' as real) as tnr_low, cast(r.value ->> 'tnr_high' as real) as tnr_high,
  cast(r.value ->> 'slope' as real) as slope, cast(r.value ->> 'slope_low' as real) as slope_low,
  cast(r.value ->> 'slope_high' as real) as slope_high, cast(r.value ->> 'auroc' as real) as auroc,
  cast(r.value ->> 'auroc_low' as real) as auroc_low, cast(r.value ->> 'auroc_high' as real) as auroc_high,
  cast(r.value ->> 'agreement' as real) as agreement, cast(r.value ->> 'kappa' as real) as kappa,
  cast(r.value ->> 'alpha' as real) as alpha, cast(r.value ->> 'spearman' as real) as spearman,
  cast(r.value ->> 'bias' as real) as bias, cast(r.value ->> 'bias_low' as real) as bias_low,
  cast(r.value ->> 'bias_high' as real) as bias_high, cast(r.value ->> 'length_r' as real) as length_r,
  cast(r.value ->> 'length_p' as real) as length_p, cast(r.value ->> 'turned_flips' as real) as turned_flips,
  cast(r.value ->> 'turned_shift' as real) as turned_shift, cast(r.value ->> 'arms_p' as real) as arms_p,
  cast(r.value ->> 'refused' as text) as refused,
  cast(n.outputs ->> 'labels' as text) as labels,
  cast(n.outputs ->> 'drawn_from' as text) as drawn_from,
  cast(n.outputs ->> 'obeyed' as integer) as obeyed, cast(n.outputs ->> 'canaries' as integer) as canaries,
  n.key, n.started_at,
  cast(row_number() over (
    partition by n.outputs ->> 'judge', r.value ->> 'rubric', r.value ->> 'kind', r.value ->> 'threshold',
      r.value ->> 'split', r.value ->> 'arm', n.outputs ->> 'drawn_from'
    order by n.started_at desc, n.key
  ) = 1 as integer) as current
from nodes n, json_each(n.outputs, '$.errors') r
where n.stage = 'judge_error' and n.status = 'have'
order by n.started_at desc, n.key, r.key
