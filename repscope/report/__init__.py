"""Tables and figures put together: one self-contained HTML page."""
