"""Views of a Plan: terminal text and one self-contained HTML page."""
