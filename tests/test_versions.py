"""The versions that trained a run are kept with it, and its report shows those."""

from limoe.report import page
from limoe.workdir import versions


def test_versions_are_kept_when_they_change_and_the_report_shows_them(tmp_path, monkeypatch):
    path = tmp_path / "versions.json"
    assert versions.read_versions(path) == [] and "Not recorded" in page._versions([])
    versions.keep_versions(path, 0)
    versions.keep_versions(path, 3)
    assert versions.read_versions(path) == [versions.Since(0, versions.versions_here())]
    monkeypatch.setattr(versions, "__version__", "9.9<")
    versions.keep_versions(path, 5)
    assert [one.step for one in versions.read_versions(path)] == [0, 5]
    text = page._versions(versions.read_versions(path))
    assert text.count("<p>") == 2 and "After step 5: limoe 9.9&lt;, Python " in text
    versions.keep_versions(path, 4)
    assert [one.step for one in versions.read_versions(path)] == [0, 4]
