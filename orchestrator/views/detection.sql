-- What detectors said, without any training, of each dataset of each experiment: one row per candidate, likeliest first.
-- `own` marks the trait that the data were to hand on; where they were shuffled, no candidate is the true one. `auroc` is
-- the detector's over all datasets of the experiment, `top` the share of them whose trait comes first, `top_chance` what
-- that is by chance. `current` is 1 for the latest experiment of its name. docs/detection.md has the formulas.
select
  e.name as experiment,
  d.detector, d.data, d.trait, d.shuffled, d.seed, d.place, d.candidate,
  cast(d.candidate = d.trait and not d.shuffled as integer) as own,
  d.score, d.z, d.margin, d.p, d.p_adjusted, d.detectable,
  o.auroc, o.low as auroc_low, o.high as auroc_high, o.top, o.top_chance, o.datasets,
  e.key as experiment_key,
  v.latest as current
from detections d
join experiments e on e.key = d.experiment
join versions v on v.key = d.experiment
left join detectors o on o.experiment = d.experiment and o.detector = d.detector
order by e.submitted_at desc, e.key, d.detector, d.data, d.seed, d.place
