"""Whether a buffer is whole."""

from builders import STATUSES, a_receipt, snapshot


class TestCheckIntegrity:
    def test_sound(self, repository, engine):
        """A buffer that only this package has written is sound; each check has run, and nothing was changed."""
        for status in STATUSES:
            a_receipt(repository, status)
        before = snapshot(engine)
        found = repository.check_integrity()
        assert {()} == set(found.findings.values())
        assert {"settings", "rules of the tables", "dead letters", "counts", "documents"} <= set(found.findings)
        assert (found.is_sound, str(found)) == (True, "")
        assert before == snapshot(engine)
