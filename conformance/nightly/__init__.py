"""The nightly run: everything that CI asks once a day, and a short text of what broke and since when."""
