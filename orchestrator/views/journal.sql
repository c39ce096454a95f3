-- The results table in the columns of research journal 004: one row per setting and eval. `coherence_low` and
-- `coherence_high` are the ends of the doses around 0 at which, and at every dose between, the damage to the development
-- passages keeps the budget: the doses from which one could be chosen. `degradation` is the damage to the test passages
-- at the chosen dose, nats per token. `parameters` are the numbers that a fit learned, averaged over seeds, `efficiency`
-- is transfer for each factor of ten of them, null where there are fewer than two (a prompt) or a fit does not say.
-- `breadth` of `breadth_of` other values moved significantly. Formulas: docs/metrics.md.
with damage as (
  select m.experiment, m.group_key, m.dose, m.value, json_extract(e.spec, '$.budget.delta_nll') as budget
  from metrics m
  join experiments e on e.key = m.experiment
  where m.metric = 'delta_nll' and m.split = 'dev'
),
harmless as (
  select d.experiment, d.group_key, min(d.dose) as low, max(d.dose) as high
  from damage d
  where not exists (
    select 1
    from damage nearer
    where nearer.experiment = d.experiment and nearer.group_key = d.group_key
      and nearer.dose between min(d.dose, 0) and max(d.dose, 0)
      and (nearer.value is null or nearer.value > nearer.budget)
  )
  group by d.experiment, d.group_key
),
sizes as (
  select t.experiment, t.group_key, avg(json_extract(n.outputs, '$.parameters')) as parameters
  from trials t
  join nodes n on n.key = t.fit
  group by t.experiment, t.group_key
)
select
  l.rank,
  l.experiment,
  l.trial,
  l.method,
  l.eval,
  l.transfer, l.transfer_low, l.transfer_high, l.p_holm, l.significant,
  l.dose,
  h.low as coherence_low,
  h.high as coherence_high,
  l.unit,
  l.delta_nll as degradation,
  cast(s.parameters as real) as parameters,
  cast(case when s.parameters >= 2 then l.transfer / log10(s.parameters) end as real) as efficiency,
  l.breadth,
  l.breadth_of,
  l.shifted,
  l.others,
  l.specificity,
  l.n, l.seeds, l.status, l.baseline, l.rankable, l.group_key, l.experiment_key, l.complete, l.submitted_at, l.current
from leaderboard l
left join harmless h on h.experiment = l.experiment_key and h.group_key = l.group_key
left join sizes s on s.experiment = l.experiment_key and s.group_key = l.group_key
order by l.submitted_at desc, l.experiment_key, l.eval, l.rank nulls last, l.trial
