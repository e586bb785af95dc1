"""Prepare MovieLens latest-small: ratings as likes, three groups of genres as scenarios."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
import zipfile
from pathlib import Path

from llm_knowledge.errors import InputError
from trainer.data.dataset import (
    DatasetInfo,
    Scenario,
    SplitInfo,
    SplitName,
    event_schema,
    item_fields,
)
from trainer.data.sources.raw_columns import refuse_twins
from trainer.data.sources.staging import Staging, finish, stage_log
from trainer.data.sources.writer import connect, output_directory

logger = logging.getLogger(__name__)

URL = "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
# GroupLens gives no checksum for this archive. This one is the archive of 26 September 2018
# (978,202 bytes: 100,836 ratings, 9,742 movies), as TensorFlow Datasets pins it too. It is checked on
# download only: a folder given or found may be a re-export, so for that one the layout and the values
# are checked, and dataset.json records the checksums of the files that were read.
ZIP_SHA256 = "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436"
LARGEST_DOWNLOAD = 4 << 20
LARGEST_MEMBER = 16 << 20
FILES = ("ratings.csv", "movies.csv")
LIKED_FROM = 4.0
FRACTIONS: dict[SplitName, float] = {"profile": 0.4, "train": 0.4, "valid": 0.1, "test": 0.1}

# First match decides, so the order is part of the definition.
GENRE_GROUPS = {
    "action_thriller": (
        [
            "Action",
            "Adventure",
            "Sci-Fi",
            "Thriller",
            "Crime",
            "Horror",
            "Mystery",
            "War",
            "Western",
            "Film-Noir",
        ]
    ),
    "comedy_family": ["Comedy", "Animation", "Children", "Musical"],
}
OTHER = "drama_other"
SCENARIOS = [
    Scenario(
        scenario_id="action_thriller",
        name="Action and thriller",
        description=(
            "Films of suspense and spectacle: action, adventure, science fiction, thriller, crime, "
            "horror, mystery, war, western and film noir. Viewers look for tension and excitement."
        ),
    ),
    Scenario(
        scenario_id="comedy_family",
        name="Comedy and family",
        description=(
            "Light films without a strong thriller or adventure side: comedies, animation, "
            "children's films and musicals. Viewers look for something funny or for the whole family."
        ),
    ),
    Scenario(
        scenario_id="drama_other",
        name="Drama and others",
        description=(
            "Dramas, romances, documentaries and everything else that is neither action nor comedy. "
            "Viewers look for serious stories, feelings and real life."
        ),
    ),
]


def prepare_movielens(
    raw: Path | None, out: Path, held_out_users: float = 0.0, held_out_valid_users: float = 0.0
) -> DatasetInfo:
    """Prepare MovieLens latest-small.

    A rating of 4 or more is a like. The scenario of a rating is the genre group of its movie.

    Args:
        raw: folder with ratings.csv and movies.csv, or the archive; None: look for it in the usual
            places, else download it into the cache.
        out: dataset directory to create.
        held_out_users: share of the users of whom nothing is trained, see `SplitInfo`.
        held_out_valid_users: a further share, who validate in place of being tested.

    Raises:
        InputError: not found and not to be downloaded, or the files are not as they should be.
    """
    import duckdb

    source = _given(raw) if raw is not None else (find_movielens() or _download())
    with output_directory(out) as folder:
        con = connect(folder / "scratch")
        try:
            _load(con, source)
        except duckdb.Error as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{source}: not as MovieLens latest-small should be: {reason}"
            ) from None
        _check(con, source)
        _write_items(con, folder / "items.parquet")
        split = SplitInfo(
            rule="per_user_time",
            fractions=FRACTIONS,
            held_out_users=held_out_users,
            held_out_valid_users=held_out_valid_users,
            text="Each user's ratings in order of time: first 40% profile, then 40% train, 10% "
            "valid, 10% test; ratings of the same second stay together.",
        )
        staging = Staging(folder / "scratch" / "staged", event_schema("int64", "int64", "string"))
        stage_log(con, "events", staging, folder / "scratch", split)
        info = DatasetInfo(
            name="movielens-latest-small",
            source={
                "kind": "movielens",
                "url": URL,
                "label": f"rating >= {LIKED_FROM:g}",
                "sha256": {name: _sha256(source / name) for name in FILES},
                "terms": "Research use; see GroupLens' README. Harper and Konstan, 2015, "
                "https://doi.org/10.1145/2827872",
            },
            scenarios=SCENARIOS,
            user_id_type="int64",
            item_id_type="int64",
            scenario_id_type="string",
            split=split,
            positive_name="liked",
            negative_name="disliked",
        )
        return finish(con, staging, folder, info)


def _load(con, source: Path) -> None:  # type: ignore[no-untyped-def]
    """Tables ratings, movies and the view events."""
    ratings = {"userId": "BIGINT", "movieId": "BIGINT", "rating": "DOUBLE", "timestamp": "BIGINT"}
    movies = {"movieId": "BIGINT", "title": "VARCHAR", "genres": "VARCHAR"}
    for table, columns in (("ratings", ratings), ("movies", movies)):
        file = source / f"{table}.csv"
        header = file.open(encoding="utf-8-sig", errors="replace").readline().strip().split(",")
        for name in columns:
            if name not in header:
                raise InputError(f"{file}: column {name!r} is missing; it has {header}")
            refuse_twins(file, header, name)
        con.execute(
            f"CREATE TABLE {table} AS SELECT * FROM read_csv(?, header=true, auto_detect=false, "
            "delim=',', quote='\"', escape='\"', columns=?)",
            [str(file), {name: columns.get(name, "VARCHAR") for name in header}],
        )
    groups = " ".join(
        f"WHEN list_has_any(string_split(genres, '|'), {genres}) THEN '{group}'"
        for group, genres in GENRE_GROUPS.items()
    )
    con.execute(
        "CREATE VIEW events AS SELECT userId AS user_id, movieId AS item_id, "
        f"CASE {groups} ELSE '{OTHER}' END AS scenario_id, timestamp, "
        f"CAST(rating >= {LIKED_FROM} AS TINYINT) AS label "
        "FROM ratings LEFT JOIN movies USING (movieId)"
    )


def _check(con, source: Path) -> None:  # type: ignore[no-untyped-def]
    bad = con.execute(
        "SELECT userId, movieId, rating, timestamp FROM ratings WHERE userId IS NULL OR "
        "movieId IS NULL OR timestamp IS NULL OR rating IS NULL OR isnan(rating) "
        "OR NOT rating BETWEEN 0.5 AND 5"
    ).fetchone()
    if bad:
        raise InputError(
            f"{source / 'ratings.csv'}: row {','.join(map(str, bad))}: every field must be there, "
            "and the rating between 0.5 and 5"
        )
    twice = con.execute(
        "SELECT movieId FROM movies GROUP BY 1 HAVING count(*) > 1 OR movieId IS NULL"
    ).fetchone()
    if twice:
        raise InputError(f"{source / 'movies.csv'}: movieId {twice[0]} is null or stands twice")


def _write_items(con, file: Path) -> None:  # type: ignore[no-untyped-def]
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = con.execute(
        "SELECT movieId AS item_id, coalesce(title, '') AS title, "
        "list_filter(string_split(coalesce(genres, ''), '|'), "
        "lambda x: x NOT IN ('', '(no genres listed)')) AS categories "
        "FROM movies FULL JOIN (SELECT DISTINCT movieId FROM ratings) USING (movieId) ORDER BY 1"
    ).to_arrow_table()
    pq.write_table(table.cast(pa.schema(item_fields("int64"))), file, write_page_checksum=True)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ---------------------------------------------------------------- where the files come from


def cache_folder() -> Path:
    """The user's cache folder for downloaded data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm4msr"


def usual_places(name: str) -> list[Path]:
    """Where data of this name may lie, best first."""
    bases = [Path.cwd(), Path(__file__).resolve().parents[3]]
    places = [base / part / name for part in ("data", "../shared/data") for base in bases]
    return [*places, cache_folder() / name]


def find_movielens() -> Path | None:
    """The first usual place that holds both files, or None."""
    for folder in usual_places("ml-latest-small"):
        if all((folder / name).is_file() for name in FILES):
            return folder
    return None


def _given(raw: Path) -> Path:
    if zipfile.is_zipfile(raw):
        return _extract(raw.read_bytes(), str(raw))
    missing = [name for name in FILES if not (raw / name).is_file()]
    if missing:
        raise InputError(
            f"{raw}: {missing[0]} is missing; --raw is the folder of ml-latest-small.zip"
        )
    return raw


def _download() -> Path:
    """Fetch the archive into the cache."""
    import http.client
    import urllib.request

    help_text = (
        f"MovieLens was not found, and could not be downloaded from {URL}. Download it elsewhere and "
        "give the file or folder as --raw, or use `simulate`, which needs no download"
    )
    logger.info("downloading %s", URL)
    try:
        with urllib.request.urlopen(URL, timeout=20) as response:
            content = response.read(LARGEST_DOWNLOAD + 1)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{help_text} ({error})") from None
    checksum = hashlib.sha256(content).hexdigest()
    if checksum != ZIP_SHA256:
        raise InputError(f"{help_text} (SHA-256 of what came is {checksum}, expected {ZIP_SHA256})")
    return _extract(content, URL)


def _extract(content: bytes, origin: str) -> Path:
    """Unpack the two files of an archive into the cache; the folder appears whole."""
    target = cache_folder() / f"ml-latest-small-{hashlib.sha256(content).hexdigest()[:12]}"
    if hashlib.sha256(content).hexdigest() == ZIP_SHA256:
        target = cache_folder() / "ml-latest-small"
    if all((target / name).is_file() for name in FILES):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent))
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in FILES:
                # The names are ours, so no path of the archive is ever used to write.
                with archive.open(f"ml-latest-small/{name}") as member:
                    data = member.read(LARGEST_MEMBER + 1)
                if len(data) > LARGEST_MEMBER:
                    raise InputError(f"{origin}: {name} is larger than it can be; not MovieLens")
                (work / name).write_bytes(data)
        os.replace(work, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{origin}: not the archive of MovieLens latest-small: {error}") from None
    except OSError as error:
        raise InputError(f"{target}: cannot unpack MovieLens here: {error}") from None
    return target
