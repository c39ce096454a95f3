-- The leaderboard's rows of judged evals, as the judge saw them and without the judge's errors. `corrected` is Rogan and
-- Gladen's: transfer / slope, where the slope is J for rates, at the threshold that the eval has, and the judge's slope
-- for scores; its interval carries the uncertainty of both. `powered` is prediction-powered: transfer less the
-- difference of the judge's bias in both arms, on labelled answers that were drawn from this experiment; only for
-- contrasts with the untouched subject (`on`). `uncorrected` says why there is no corrected estimate.
-- `role` is the rubric that the transfer is about: the only one, or the one that a setting `ROLE_below` belongs to,
-- whose "yes" counts against the transfer. Other rubrics of such an eval are conditions, taken as they are.
with roles as (
  select
    c.experiment, c.group_key, c.eval,
    r.key as role,
    r.value as of_rubric,
    case when c.scoring ->> '$.measure' = 'rate' then 'rate' else 'score' end as measure,
    json_extract(c.scoring, '$.' || r.key || '_below') as below,
    count(*) over (partition by c.experiment, c.group_key, c.eval) as several
  from comparisons c, json_each(c.rubrics) r
  where c.judge is not null
),
known as (
  select
    c.*, e.name, r.measure, r.role, r.of_rubric, r.below,
    case when r.below is null then 1 else -1 end as sign,
    j.key as calibration, j.threshold, j.slope, j.slope_low, j.slope_high, j.auroc, j.auroc_low, j.auroc_high,
    j.tpr, j.tnr, j.n as labelled, j.unscored as labelled_unscored, j.arms_p, j.obeyed,
    case
      when j.key is null then 'not calibrated: run `orch judge calibrate` for this judge, rubric and threshold'
      when j.refused is not null then j.refused
      when j.arms_p < 0.05 then 'the judge errs differently on base and treated answers: p = ' || round(j.arms_p, 4)
    end as uncorrected,
    c.transfer - c.ci_low as down, c.ci_high - c.transfer as up,
    case when c.ci_low > 0 then j.slope_high - j.slope else j.slope - j.slope_low end as down_slope,
    case when c.ci_high > 0 then j.slope - j.slope_low else j.slope_high - j.slope end as up_slope
  from comparisons c
  join experiments e on e.key = c.experiment
  join roles r on r.experiment = c.experiment and r.group_key = c.group_key and r.eval = c.eval
    and (r.several = 1 or r.below is not null)
  left join judges j on j.current and j.judge = c.judge and j.rubric = r.of_rubric and j.kind = r.measure
    and j.split = 'test' and j.arm = 'all' and j.drawn_from is null
    and (r.measure = 'score' or j.threshold = r.below)
),
roots as (
  select
    *,
    slope * slope - down_slope * down_slope as down_square,
    slope * slope - up_slope * up_slope as up_square
  from known
),
drawn as (
  select judge, rubric, kind, threshold, drawn_from, arm, bias, bias_low, bias_high, n
  from judges
  where current and split = 'test' and drawn_from is not null
),
powers as (
  select
    k.experiment, k.group_key, k.eval,
    k.transfer - k.sign * (t.bias - b.bias) as powered,
    case when k.sign > 0 then t.bias_high - t.bias else t.bias - t.bias_low end as t_down,
    case when k.sign > 0 then t.bias - t.bias_low else t.bias_high - t.bias end as t_up,
    case when k.sign > 0 then b.bias - b.bias_low else b.bias_high - b.bias end as b_down,
    case when k.sign > 0 then b.bias_high - b.bias else b.bias - b.bias_low end as b_up,
    t.n + b.n as drawn
  from known k
  join drawn t on t.judge = k.judge and t.rubric = k.of_rubric and t.kind = k.measure and t.drawn_from = k.name
    and t.arm = 'treated' and (k.measure = 'score' or t.threshold = k.below)
  join drawn b on b.judge = t.judge and b.rubric = t.rubric and b.kind = t.kind and b.drawn_from = t.drawn_from
    and b.arm = 'base' and b.threshold is t.threshold
  where k.contrast = 'on'
)
select
  r.name as experiment,
  r.label as trial,
  r.eval,
  r.judged_by,
  r.role,
  r.measure,
  r.transfer, r.ci_low as transfer_low, r.ci_high as transfer_high,
  cast(case when r.uncorrected is null then r.transfer / r.slope end as real) as corrected,
  cast(case when r.uncorrected is null and r.down_square > 0 then
    (r.transfer * r.slope - sqrt(r.transfer * r.transfer * r.slope * r.slope
      - r.down_square * (r.transfer * r.transfer - r.down * r.down))) / r.down_square
  end as real) as corrected_low,
  cast(case when r.uncorrected is null and r.up_square > 0 then
    (r.transfer * r.slope + sqrt(r.transfer * r.transfer * r.slope * r.slope
      - r.up_square * (r.transfer * r.transfer - r.up * r.up))) / r.up_square
  end as real) as corrected_high,
  cast(p.powered as real) as powered,
  cast(p.powered - sqrt(r.down * r.down + p.t_down * p.t_down + p.b_down * p.b_down) as real) as powered_low,
  cast(p.powered + sqrt(r.up * r.up + p.t_up * p.t_up + p.b_up * p.b_up) as real) as powered_high,
  p.drawn as powered_by,
  cast(r.uncorrected as text) as uncorrected,
  cast(r.calibration is not null as integer) as calibrated,
  r.slope, r.slope_low, r.slope_high, r.auroc, r.auroc_low, r.auroc_high, r.tpr, r.tnr, r.threshold,
  r.labelled, r.labelled_unscored, r.arms_p, r.obeyed,
  r.judge, r.of_rubric as rubric, r.scoring, r.calibration, r.contrast, r.group_key, r.experiment as experiment_key,
  cast(v.current as integer) as current
from roots r
join versions v on v.key = r.experiment
left join powers p on p.experiment = r.experiment and p.group_key = r.group_key and p.eval = r.eval
order by r.experiment, r.eval, r.transfer desc nulls last, r.label
