"""The dashboard over HTTP, queries as JSON, and ingest of run files: `conformance serve`.

`app` puts it together · `guard` what every answer passes · `pages` the dashboard · `api` queries ·
`newest` what most of them ask for · `models` what they are answered with · `ingest` runs that are sent ·
`names` what names look like in addresses · `listening` the server itself.
This module imports no FastAPI, which takes long to load.
"""
