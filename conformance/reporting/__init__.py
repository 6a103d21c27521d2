"""The static dashboard: what it shows (`view`), how text is drawn (`text`, `diff`), and its pages."""
