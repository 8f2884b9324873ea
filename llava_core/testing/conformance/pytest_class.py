"""The kit as a pytest class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from llava_core.backend import Backend
from llava_core.plugins import Registry
from llava_core.testing.conformance.check import Check, run_check
from llava_core.testing.conformance.result import Status
from llava_core.testing.conformance.suite import all_checks, build_subject


class BackendConformance:
    """Subclass it as `Test…` and name the backend: each check is a test, called by its id.

    Attributes:
        backend: a registered backend's name, or a `Backend` class.
    """

    backend: ClassVar[str | type[Backend]]

    @classmethod
    def checks(cls) -> list[Check]:
        """Every check; override it to leave some out. Nothing is opened before a test needs the device."""
        registry = Registry.discover()
        kind = registry.load("backend", cls.backend) if isinstance(cls.backend, str) else cls.backend
        return all_checks(build_subject(kind(), registry))

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Pytest's hook: one test a check."""
        if "check" in metafunc.fixturenames:
            checks = self.checks()
            metafunc.parametrize("check", checks, ids=[check.id for check in checks])

    def test_conforms(self, check: Check) -> None:
        """What the check says."""
        import pytest

        with process_settings():
            result = run_check(check)
        if result.status is Status.SKIPPED:
            pytest.skip(result.message)
        if result.status is Status.FAILED:
            pytest.fail(f"{check.explanation}: {result.message}", pytrace=False)


@contextmanager
def process_settings() -> Iterator[None]:
    """Opening a device sets threads and determinism for the whole process: other tests find them as they were."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
