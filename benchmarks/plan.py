"""How long planning takes: a grid of 10,000 trials, four doses, two evals and the damage task; imports included.

python benchmarks/plan.py [trials]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

PROGRAM = """
import time; started = time.perf_counter()
from types import SimpleNamespace
from experiments import source, spec
from orchestrator.plan import plan
imported = time.perf_counter()
trials = {trials}
text = f'''
name: big
subject: m
data: {{{{pairs: {{{{recipe: persona_pairs, positive: yes-sayer, negative: no-sayer}}}}}}}}
interventions:
  - {{{{method: mean_diff, layer: [{{", ".join(map(str, range(max(1, trials // 10))))}}]}}}}
doses: [-2, -1, 1, 2]
evals: [{{{{task: animal_preference, target: owl}}}}, {{{{task: daily_dilemmas, target: honesty}}}}]
seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
limits: {{{{trials: 1000000}}}}
'''
experiment = spec.from_source(source.parse(text))
parsed = time.perf_counter()
facts = SimpleNamespace(version=1, higher_is="more target", runtime={{}}, identity={{"target": "x", "data": "0" * 64}})
identity = {{"model": "m", "template": "0" * 64, "dtype": "float32", "system": None}}
made = plan(experiment, lambda _: identity, lambda *_: facts)
done = time.perf_counter()
print(f"{{len(made.trials):,}} trials, {{len(made.nodes):,}} nodes: imports {{imported - started:.2f}} s, "
      f"spec {{parsed - imported:.2f}} s, plan {{done - parsed:.2f}} s, all {{done - started:.2f}} s")
"""


def main() -> None:
    """Plan in a fresh interpreter, and print seconds and memory."""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROGRAM.format(trials=trials)], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"wall {time.perf_counter() - started:.2f} s, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
