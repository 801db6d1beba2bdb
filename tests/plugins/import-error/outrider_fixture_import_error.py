"""It needs a package that is not installed."""

import no_such_package_here  # noqa: F401
