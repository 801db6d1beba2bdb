"""What a step plugin is tested with: the conformance kit, a pytest plugin.

    from outrider.testing import Example, Failing, StepConformance, Wrong

    class TestManifestCreate(StepConformance):
        step_type = "manifest.create"
        examples = [Example("two files", {"of": "/data", "to": "/data/list"}, volumes={"data": "/data:rw"},
                            files={"data/a": b"1", "data/b": b"2"}, outputs={"files": 2})]
        failing = [Failing("no directory", {"of": "/data/x", "to": "/data/list"}, volumes={"data": "/data:rw"},
                           code="not_a_directory")]
        wrong = [Wrong("relative path", {"of": "x", "to": "/data/list"}, says="with.of")]
        quick = "it reads a handful of small files"

Install it with ``pip install 'outrider[testing]'``; pytest finds it by itself. What each check looks for stands in
docs/step-authors.md, and in the docstrings of `StepConformance`.
"""

from __future__ import annotations

from outrider.testing._conformance import StepConformance
from outrider.testing._examples import Attempted, Example, Failing, Values, Wrong

__all__ = ["Attempted", "Example", "Failing", "StepConformance", "Values", "Wrong"]
