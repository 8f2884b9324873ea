"""The conformance kit: what a backend must do, as checks that a vendor runs on its own hardware.

`llava-core certify --backend NAME` runs them and shows a certificate. In pytest each is a test of its own:

    from llava_core.testing.conformance import BackendConformance

    class TestMine(BackendConformance):
        backend = "mine"
"""

from llava_core.testing.conformance.pytest_class import BackendConformance
from llava_core.testing.conformance.result import Certificate, Result, Status
from llava_core.testing.conformance.subject import Subject
from llava_core.testing.conformance.suite import all_checks, build_subject, certify, select_checks

__all__ = [
    "BackendConformance",
    "Certificate",
    "Result",
    "Status",
    "Subject",
    "all_checks",
    "build_subject",
    "certify",
    "select_checks",
]
