# SPDX-License-Identifier: Apache-2.0
"""Links that lead out of a model's folder are told from those of the Hub's cache."""

from pretrained.core.untrusted import leads_out


def test_links_of_the_hubs_cache_stay_inside(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "abc").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (tmp_path / "secret").write_text("x")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    (snapshot / "plain").write_text("x")
    found = [leads_out(snapshot, snapshot / name) for name in ("config.json", "vocab.txt", "plain")]
    assert found == [False, True, False]
