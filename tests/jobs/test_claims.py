"""Several machines that claim the same job folder."""

from __future__ import annotations

import json
from pathlib import Path

from tiler.jobs import claims


def test_an_owner_who_was_away_leaves_the_claim_of_another_alone(tmp_path: Path) -> None:
    job = tmp_path / "new" / "x.png.tiler"
    assert claims.claim(job) and claims.is_ours(job)
    others = json.dumps({"host": "elsewhere", "pid": 7, "start": "now"})
    (job / claims.OWNER).write_text(others)
    before = (job / claims.OWNER).stat().st_mtime_ns
    claims.touch(job)
    claims.release(job)
    assert not claims.is_ours(job) and (job / claims.OWNER).read_text() == others
    assert (job / claims.OWNER).stat().st_mtime_ns == before
