"""One run as one HTML page: pictures as inline SVG, tables behind them, no script and nothing from elsewhere."""

from tolaria.report_page.page import build_page

__all__ = ["build_page"]
