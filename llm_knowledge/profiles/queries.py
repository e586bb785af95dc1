"""What is known of a user, a scenario and an item: one definition in SQL for DuckDB and for Spark.

Every query reads the views `events` (user_id, item_id, scenario_id, timestamp, label) and `items`
(item_id, title, categories). What the two engines spell differently is the `Dialect`; both give the
same rows, text and order: strings are ordered by their UTF-8 bytes, every order is total, and no
aggregate depends on the order of its input.

Rows of label 0 are events only where label 0 means something (`negatives`). Elsewhere they were sampled:
nobody met those items, and whoever counts them counts the sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_TITLE = 1000  # characters of a title or a list of categories that reach a profile
# Categories that a user prefers, and as many that the user avoids; how far the share of liked items
# must be from the user's own to say so; items that a category is held to have besides, at that share.
TASTES, LEAST_TASTE, TASTE_PRIOR = 4, 0.03, 3


@dataclass(frozen=True)
class Dialect:
    """How an engine spells what SQL leaves open."""

    name: str
    explode: str  # list -> rows
    join_texts: str  # (list, separator) -> text, nulls left out
    choose: str  # those c of {list} that are {kept}
    empty_list: str

    def struct(self, **fields: str) -> str:
        """A record of named expressions."""
        if self.name == "duckdb":
            return "{" + ", ".join(f"'{name}': {value}" for name, value in fields.items()) + "}"
        return "named_struct(" + ", ".join(f"'{n}', {value}" for n, value in fields.items()) + ")"

    def ordered_list(self, value: str, *order: str) -> str:
        """Aggregate: the values of a group, ascending by `order`."""
        if self.name == "duckdb":
            return f"list({value} ORDER BY {', '.join(order)})"
        keys = {f"k{place}": key for place, key in enumerate(order)}
        rows = self.struct(**keys, value=value)
        return f"transform(array_sort(collect_list({rows})), entry -> entry.value)"


DUCKDB = Dialect("duckdb", "unnest", "array_to_string", "[c FOR c IN {list} IF {kept}]", "[]")
SPARK = Dialect("spark", "explode", "array_join", "filter({list}, c -> {kept})", "array()")


def _met(negatives: bool) -> str:
    """Which rows of `events` happened."""
    return "" if negatives else "WHERE label = 1"


# What a reader sees nothing of: spaces, characters of control and format, private ones, fillers, an empty
# Braille cell, variation selectors, tags. `clean` of `prompts` leaves nothing of such a text either.
_UNSEEN = (
    r"[\p{Z}\p{Cc}\p{Cf}\p{Co}\x{34F}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{180B}-\x{180F}\x{2800}\x{3164}"
    r"\x{FE00}-\x{FE0F}\x{FFA0}\x{E0000}-\x{E0FFF}]"
)


def _readable(text: str) -> str:
    """Text in one piece, empty where a reader would see nothing."""
    start = f"substring({text}, 1, {MAX_TITLE})"
    return f"CASE WHEN regexp_replace({start}, '^{_UNSEEN}+', '') = '' THEN '' ELSE {start} END"


def _categories(dialect: Dialect) -> str:
    """An item's readable categories, never null."""
    kept = f"c IS NOT NULL AND {_readable('c')} <> ''"
    return f"coalesce({dialect.choose.format(list='categories', kept=kept)}, {dialect.empty_list})"


def user_query(
    dialect: Dialect,
    per_scenario: int,
    total: int,
    negatives: bool,
    at_least: int,
    cutoff: int | None,
    tastes: bool = False,
) -> str:
    """Rows (key, cutoff, data), by key: each user's newest items, most recent first.

    Where label 0 means disliked, `data` also says of how many items, and how many of them were liked;
    with `tastes`, which categories the user likes more and less than others, the most marked first.
    An item without a title is named by its categories; one without either is left out of the lists. An
    item met twice in a scenario counts once, with its newest label (the liked one of two at the same
    time). Ties in time go by item, then by scenario.

    Args:
        dialect: of the engine.
        per_scenario: liked items of each scenario, and as many disliked ones.
        total: liked items over all scenarios, and as many disliked ones.
        negatives: whether label 0 means disliked; without, such rows are no events.
        at_least: users with fewer events have no row.
        cutoff: the row's cut-off; None: the user's newest event.
        tastes: whether categories are compared; without `negatives` they never are.
    """
    shown = dialect.struct(scenario="scenario_id", liked="label = 1", title="text")
    newest = "max(newest)" if cutoff is None else f"CAST({cutoff} AS BIGINT)"
    items = dialect.ordered_list(shown, "-newest", "item_id", "scenario_id")
    with_tastes, join_tastes = "", ""
    if tastes and negatives:
        with_tastes = _tastes(dialect)
        join_tastes = "LEFT JOIN tastes t ON e.user_id = t.user_id"
    head = _first_fields(negatives, tastes)
    return f"""
WITH met AS (
  SELECT user_id, scenario_id, item_id, count(*) AS times, max(timestamp) AS newest,
         max(2 * timestamp + label) - 2 * max(timestamp) AS label
  FROM events {_met(negatives)} GROUP BY user_id, scenario_id, item_id
), enough AS (
  SELECT user_id, {newest} AS cutoff, count(*) AS met, sum(label) AS liked
  FROM met GROUP BY user_id HAVING sum(times) >= {at_least}
), named AS (
  SELECT m.user_id, m.scenario_id, m.item_id, m.newest, m.label,
         CASE WHEN i.title_text <> '' THEN i.title_text ELSE i.category_text END AS text
  FROM met m JOIN enough e ON m.user_id = e.user_id
  JOIN ({_item_texts(dialect)}) i ON m.item_id = i.item_id
), per_scenario AS (
  SELECT *, row_number() OVER (PARTITION BY user_id, scenario_id, label
                               ORDER BY newest DESC, item_id) AS place
  FROM named WHERE text <> ''
), recent AS (
  SELECT *, row_number() OVER (PARTITION BY user_id, label
                               ORDER BY newest DESC, item_id, scenario_id) AS position
  FROM per_scenario WHERE place <= {per_scenario}
), lists AS (
  SELECT user_id, {items} AS items FROM recent WHERE position <= {total} GROUP BY user_id
){with_tastes}
SELECT e.user_id AS key, e.cutoff AS cutoff,
       {head} || '"items":' || coalesce(CAST(to_json(l.items) AS STRING), '[]') || '}}' AS data
FROM enough e LEFT JOIN lists l ON e.user_id = l.user_id {join_tastes} ORDER BY key
"""


def _item_texts(dialect: Dialect) -> str:
    """Query of items' titles and categories as text that can be read."""
    categories = f"{dialect.join_texts}({_categories(dialect)}, ', ')"
    return f"""
    SELECT item_id, {_readable("coalesce(title, '')")} AS title_text,
           {_readable(categories)} AS category_text
    FROM items"""


def _first_fields(negatives: bool, tastes: bool) -> str:
    """SQL of a user's JSON up to its items."""
    counts = [f"""'"{name}":' || CAST(e.{name} AS STRING) || ','""" for name in ("met", "liked")]
    if tastes:
        counts.append("""'"tastes":' || coalesce(CAST(to_json(t.tastes) AS STRING), '[]') || ','""")
    return " || ".join(["'{'", *(counts if negatives else [])])


def _tastes(dialect: Dialect) -> str:
    """Tables behind `enough`: per user a list of {category, liked}, preferred ones first.

    A category's lean is its share of liked items less the user's own, with some items of the user's
    own share added: (liked + p * own) / (met + p) - own. Every item counts once in each scenario.
    """
    shown = dialect.struct(category="category", liked="lean > 0")
    names = dialect.ordered_list(shown, "lean <= 0", "place")
    return f""", category_of AS (
  SELECT item_id, {dialect.explode}(array_distinct(categories)) AS category FROM items
), counted AS (
  SELECT m.user_id, c.category, count(*) AS met, sum(m.label) AS liked
  FROM met m JOIN category_of c ON m.item_id = c.item_id
  WHERE {_readable("c.category")} <> '' GROUP BY m.user_id, c.category
), leaning AS (
  SELECT c.user_id, c.category, CAST(c.liked * e.met - c.met * e.liked AS DOUBLE)
         / CAST(e.met * (c.met + {TASTE_PRIOR}) AS DOUBLE) AS lean
  FROM counted c JOIN enough e ON c.user_id = e.user_id
), marked AS (
  SELECT *, row_number() OVER (PARTITION BY user_id, lean > 0
                               ORDER BY abs(lean) DESC, category) AS place
  FROM leaning WHERE abs(lean) > CAST({LEAST_TASTE} AS DOUBLE)
), tastes AS (
  SELECT user_id, {names} AS tastes FROM marked WHERE place <= {TASTES} GROUP BY user_id
)"""


def item_query(dialect: Dialect) -> str:
    """Rows (key, cutoff null, data), by key: title and categories, what is readable of them."""
    shown = dialect.struct(title=_readable("coalesce(title, '')"), categories=_categories(dialect))
    return f"""
SELECT item_id AS key, CAST(NULL AS BIGINT) AS cutoff, CAST(to_json({shown}) AS STRING) AS data
FROM items ORDER BY key
"""


def most_events_query(negatives: bool) -> str:
    """The largest number of events that a user has."""
    return f"""
SELECT max(n) FROM (SELECT count(*) AS n FROM events {_met(negatives)} GROUP BY user_id) AS counts
"""


def activity_query(negatives: bool) -> str:
    """Per scenario: events, users, items, rate of label 1, newest event."""
    return f"""
SELECT scenario_id, count(*) AS events, count(DISTINCT user_id) AS users,
       count(DISTINCT item_id) AS items, avg(label) AS rate, max(timestamp) AS newest
FROM events {_met(negatives)} GROUP BY scenario_id
"""


def category_query(dialect: Dialect) -> str:
    """How often each category is liked: events of label 1, whatever label 0 means."""
    return f"""
WITH liked AS (
  SELECT e.scenario_id, {dialect.explode}(array_distinct(i.categories)) AS category
  FROM events e JOIN items i ON e.item_id = i.item_id WHERE e.label = 1
)
SELECT scenario_id, category, count(*) AS liked FROM liked
WHERE {_readable("category")} <> '' GROUP BY scenario_id, category
ORDER BY scenario_id, liked DESC, category
"""


def pairs_query(negatives: bool) -> str:
    """Per ordered pair of scenarios: common users, and sums for whether who likes much here does there.

    A user's rate is in ten-thousandths: sums of whole numbers do not depend on their order.
    """
    return f"""
WITH tastes AS (
  SELECT user_id, scenario_id, CAST(floor(10000 * avg(label)) AS BIGINT) AS rate
  FROM events {_met(negatives)} GROUP BY user_id, scenario_id
)
SELECT a.scenario_id, b.scenario_id, count(*) AS common, sum(a.rate) AS x, sum(b.rate) AS y,
       sum(a.rate * a.rate) AS xx, sum(b.rate * b.rate) AS yy, sum(a.rate * b.rate) AS xy
FROM tastes a JOIN tastes b ON a.user_id = b.user_id
WHERE a.scenario_id <> b.scenario_id GROUP BY a.scenario_id, b.scenario_id
"""


def correlation(count: int, x: int, y: int, xx: int, yy: int, xy: int) -> float | None:
    """Pearson's correlation from whole-number sums; None where one side does not vary."""
    spread = (count * xx - x * x) * (count * yy - y * y)
    return (count * xy - x * y) / spread**0.5 if spread > 0 else None
