"""An adapter whose engine takes long to import."""

import time

time.sleep(600)
