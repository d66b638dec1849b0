"""Plain references, independent of the library, and what tests share."""

import pytest

# A failing assertion of these shows its values, as in a test.
pytest.register_assert_rewrite("support.formulations", "support.graphs", "support.kernels")
