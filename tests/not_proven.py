"""
The end of a run says what was skipped, each reason once, and what this machine could not show, in a section of its own.

Where there is no PostgreSQL server, the files that only run on one are left out of the coverage, the others are not
held to its goal, because they have branches that only run there, and that is said too.
"""

from collections import Counter

import pytest

ONLY_ON_POSTGRESQL = ["*/kkt_buffer/postgresql/*", "*/kkt_buffer/move.py", "*/kkt_buffer/cli/move.py"]


NOT_PROVEN = "NOT PROVEN: "


def _skipped(config):
    """The reasons for which tests were skipped, with their number."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", [])
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)


def _without_server(config):
    return any(reason.startswith(f"{NOT_PROVEN}PostgreSQL: ") for reason in _skipped(config))


def _coverage(config):
    """The plugin that reports the coverage, or None if it is not measured."""
    plugin = config.pluginmanager.get_plugin("_cov")
    return plugin if plugin and plugin.cov_controller else None


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session):
    """After the last test, before pytest-cov reports: trylast makes this the innermost wrapper."""
    result = yield
    config = session.config
    if not hasattr(config, "workerinput") and _without_server(config) and (coverage := _coverage(config)):
        coverage.cov_controller.combining_cov.set_option("report:omit", ONLY_ON_POSTGRESQL)
        coverage.options.cov_fail_under = None
    return result


def pytest_terminal_summary(terminalreporter, config):
    """Say what was skipped, and what was not proven."""
    skipped = _skipped(config)
    not_proven = {reason: number for reason, number in skipped.items() if reason.startswith(NOT_PROVEN)}
    for reason in skipped.keys() - not_proven:
        terminalreporter.line(f"SKIPPED, {skipped[reason]} tests: {reason}")
    if not not_proven:
        return
    terminalreporter.section("NOT PROVEN", sep="!", red=True, bold=True)
    for reason, number in not_proven.items():
        terminalreporter.line(f"NOT PROVEN, {number} tests: {reason.removeprefix(NOT_PROVEN)}", red=True)
    if _without_server(config) and _coverage(config):
        left_out = ", ".join(ONLY_ON_POSTGRESQL)
        terminalreporter.line(f"LEFT OUT of the coverage, because it only runs on PostgreSQL: {left_out}", red=True)
        terminalreporter.line("The coverage of the rest has NO GOAL here: parts of it only run there too.", red=True)
