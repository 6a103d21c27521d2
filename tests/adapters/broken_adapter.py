"""An adapter whose engine cannot be imported."""

import no_such_engine  # noqa: F401
