"""
The end of a run says what this machine could not show, in a section of its own.

Where there is no PostgreSQL server, what only runs on one is left out of the coverage, and that is said too.
"""

from collections import Counter

import pytest

ONLY_ON_POSTGRESQL = ["*/kkt_buffer/postgresql/*", "*/kkt_buffer/move.py", "*/kkt_buffer/cli/move.py"]
# Marks a block elsewhere that only runs there.
ONLY_ON_POSTGRESQL_HERE = r"# only on PostgreSQL"


def _not_proven(config):
    """The reasons for which tests were skipped, with their number."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reasons = (report.longrepr[2] for report in reporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple))
    return Counter(
        reason.removeprefix("Skipped: NOT PROVEN: ") for reason in reasons if reason.startswith("Skipped: NOT PROVEN: ")
    )


def _without_server(config):
    return any(reason.startswith("PostgreSQL: ") for reason in _not_proven(config))


def _coverage(config):
    """What reports the coverage in this process, or None if it is not measured."""
    plugin = config.pluginmanager.get_plugin("_cov")
    controller = plugin and plugin.cov_controller
    return controller and controller.combining_cov


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session):
    """After the last test, before pytest-cov reports: trylast makes this the innermost wrapper."""
    result = yield
    if not hasattr(session.config, "workerinput") and _without_server(session.config) and _coverage(session.config):
        _coverage(session.config).set_option("report:omit", ONLY_ON_POSTGRESQL)
        _coverage(session.config).exclude(ONLY_ON_POSTGRESQL_HERE)
    return result


def pytest_terminal_summary(terminalreporter, config):
    """Say what was not proven."""
    if not (reasons := _not_proven(config)):
        return
    terminalreporter.section("NOT PROVEN", sep="!", red=True, bold=True)
    for reason, number in reasons.items():
        terminalreporter.line(f"NOT PROVEN, {number} tests: {reason}", red=True)
    if _without_server(config) and _coverage(config):
        left_out = ", ".join(ONLY_ON_POSTGRESQL)
        terminalreporter.line(f"LEFT OUT of the coverage, because it only runs on PostgreSQL: {left_out}", red=True)
