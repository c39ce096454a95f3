"""Tables of the registry, as migrations, and its views, as the files in `views/`: a file's name is its view's."""

from __future__ import annotations

from pathlib import Path

from sqlite_utils import Database, Migrations

APPLICATION = 0x6F726368
"""SQLite's application_id of a registry: "orch" in ASCII. A file without it is somebody else's."""

VIEWS = Path(__file__).parent / "views"

migrations = Migrations("orch")

TABLES = """
create table experiments (
  key text primary key,                       -- key of the compare node
  name text not null,
  question text not null,
  spec text not null check (json_valid(spec)),
  complete integer not null check (complete in (0, 1)),  -- 0: some scores are missing or failed
  submitted_at text not null                  -- ISO 8601, UTC
) strict;

create table nodes (
  key text primary key,
  stage text not null,
  label text not null,
  status text not null check (status in ('have', 'failed')),
  method text,
  params text not null check (json_valid(params)),
  outputs text check (outputs is null or json_valid(outputs)),
  started_at text,
  seconds real,
  peak_rss_mib real,
  host text,
  versions text check (versions is null or json_valid(versions)),  -- distribution -> version
  error text,                                 -- last traceback of a failed node
  attempts integer
) strict;

create table node_inputs (
  node text not null references nodes(key) on delete cascade,
  role text not null,
  input text not null,                        -- key of a node, which may have no row yet
  primary key (node, role)
) strict, without rowid;
create index node_inputs_input on node_inputs(input);

create table trials (
  experiment text not null references experiments(key) on delete cascade,
  trial integer not null,
  group_key text not null,                    -- the setting: trials that differ in the seed alone share it
  method text not null,
  label text not null,
  seed integer not null,
  baseline integer not null check (baseline in (0, 1)),
  fit text,                                   -- key of the fit node; null while nothing of the trial was answered
  primary key (experiment, trial)
) strict, without rowid;

create table metrics (
  experiment text not null references experiments(key) on delete cascade,
  group_key text not null,
  eval text not null,
  split text not null check (split in ('dev', 'test')),
  dose real not null,
  metric text not null,                       -- effect, odd, even, delta_nll, other.NAME
  value real,
  se real,
  n integer not null,
  n_clusters integer not null,
  primary key (experiment, group_key, eval, split, dose, metric)
) strict, without rowid;

create table comparisons (
  experiment text not null references experiments(key) on delete cascade,
  group_key text not null,
  method text not null,
  label text not null,
  baseline integer not null check (baseline in (0, 1)),
  eval text not null,
  eval_version integer not null,
  status text not null check (status in ('ok', 'unscored', 'failed', 'over budget')),
  rankable integer not null check (rankable in (0, 1)),
  contrast text check (contrast in ('odd', 'on')),
  dose real,
  base real,
  transfer real,
  ci_low real,
  ci_high real,
  se real,
  df real,
  p real,
  p_holm real,
  significant integer not null check (significant in (0, 1)),
  even real,
  even_se real,
  delta_nll real,
  delta_nll_se real,
  specificity real,
  specificity_low real,
  specificity_high real,
  mde real,
  tests integer not null,
  versus_control real,
  versus_control_low real,
  versus_control_high real,
  versus_control_p real,
  n_items integer not null,
  n_families integer not null,
  n_seeds integer not null,
  n_dropped integer not null,
  notes text not null,
  primary key (experiment, group_key, eval),
  -- SQLite stores NaN as NULL, and sorts NULL first: what has no number must not be able to have a rank
  check (rankable = 0 or (status = 'ok' and transfer is not null and p_holm is not null))
) strict;
"""


@migrations()
def tables(db: Database) -> None:
    """The first schema."""
    for statement in TABLES.split(";\n"):  # ends of statements; no line of a statement ends so
        if statement.strip():
            db.execute(statement)


@migrations()
def calibrated_doses(db: Database) -> None:
    """What a dose of 1 meant to a trial: null where doses are those of the method."""
    db.execute("alter table trials add column unit real")


@migrations()
def moved_others(db: Database) -> None:
    """How far everything moved that was not the target, which specificity is made of."""
    db.execute("alter table comparisons add column others real")


@migrations()
def breadth(db: Database) -> None:
    """How many other values moved significantly, of how many that were tested, and which."""
    for column in ("breadth integer", "breadth_of integer", "shifted text"):
        db.execute(f"alter table comparisons add column {column}")


@migrations()
def references(db: Database) -> None:
    """What a transfer is about where data were meant to hand something on, and the control it is compared with."""
    for column in ("target text", "reference text"):
        db.execute(f"alter table comparisons add column {column}")


@migrations()
def confusions(db: Database) -> None:
    """Students by the trait their data were to hand on, against everything that was measured."""
    db.execute("""create table confusions (
      experiment text not null references experiments(key) on delete cascade,
      eval text not null,
      student text not null,                      -- the setting, without its data
      traits text not null check (json_valid(traits)),  -- rows
      names text not null check (json_valid(names)),    -- columns
      cells text not null check (json_valid(cells)),    -- mean effects, row by row
      seeds integer not null,
      excess real,                                -- how much more the own trait moved than the other traits
      p real,                                     -- by permutation, one-sided
      smallest real,                              -- the smallest p that so few datasets could give
      primary key (experiment, eval, student)
    ) strict""")


@migrations()
def detections(db: Database) -> None:
    """What detectors said of each dataset, and how well each detector detects over all of them."""
    db.execute("""create table detections (
      experiment text not null references experiments(key) on delete cascade,
      detector text not null,
      data text not null,
      trait text,                                 -- what the data were to hand on
      shuffled integer not null check (shuffled in (0, 1)),  -- 1: destroyed on purpose
      seed integer not null,
      candidate text not null,
      place integer not null,                     -- from 1, the likeliest
      score real not null, z real not null, margin real not null,
      p real not null,                            -- by permutation, of this candidate alone
      p_adjusted real not null,                   -- corrected for the number of candidates
      detectable real,
      primary key (experiment, detector, data, seed, candidate)
    ) strict""")
    db.execute("""create table detectors (
      experiment text not null references experiments(key) on delete cascade,
      detector text not null,
      auroc real not null, low real, high real,
      top real not null, top_chance real not null,
      datasets integer not null,
      primary key (experiment, detector)
    ) strict""")


@migrations()
def judged(db: Database) -> None:
    """Who judged a row's answers and how; and what experiments share that differ in their judges alone."""
    for column in ("judge", "judged_by", "rubrics", "scoring"):
        db.execute(f"alter table comparisons add column {column} text")
    for column in ("answers", "judges"):  # digests of both; null in rows of before, and where nothing is judged
        db.execute(f"alter table experiments add column {column} text")


def known() -> set[str]:
    """Names of all migrations of this version of orch."""
    return {one.name for one in migrations.pending(Database(memory=True))}


def view_texts() -> dict[str, str]:
    """Name of a view -> its SELECT, from `views/*.sql`."""
    return {file.stem: file.read_text(encoding="utf-8").strip().rstrip(";") for file in sorted(VIEWS.glob("*.sql"))}


def refresh_views(db: Database) -> None:
    """Make the views what the files say: only those whose text changed, none that has no file."""
    present = {view.name: view.schema for view in db.views}
    wanted = {name: f"CREATE VIEW {name} AS\n{text}" for name, text in view_texts().items()}
    for name in [name for name, text in present.items() if wanted.get(name) != text]:
        db.execute(f"drop view [{name}]")
        del present[name]
    for name in wanted.keys() - present.keys():
        db.execute(wanted[name])
