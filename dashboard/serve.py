"""How the dashboard is started: Streamlit, headless, configured by flags alone."""

import sys
from pathlib import Path

from services.contract.settings import Settings

HEALTH_PATH = "/_stcore/health"
"""GET answers 200 and ``ok`` once the server listens."""

APP = Path(__file__).with_name("app.py")

THEME = {
    "theme.baseRadius": "0.5rem",
    "theme.light.primaryColor": "#0f766e",
    "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f3f6f6",
    "theme.light.textColor": "#1c2527",
    "theme.dark.primaryColor": "#0f8f83",
    "theme.dark.backgroundColor": "#101517",
    "theme.dark.secondaryBackgroundColor": "#1a2225",
    "theme.dark.textColor": "#e4eaeb",
}


def command(settings: Settings) -> list[str]:
    """Arguments that serve the dashboard on settings.dashboard_host and dashboard_port.

    The process reads the API's address and key from its environment (SMOOTHKD_API_URL, SMOOTHKD_API_KEY), so that the
    key stands in no list of processes.
    """
    flags = {
        "server.headless": "true",
        "server.address": settings.dashboard_host,
        "server.port": str(settings.dashboard_port),
        "server.fileWatcherType": "none",
        "server.maxUploadSize": "1",
        "browser.gatherUsageStats": "false",
        "runner.magicEnabled": "false",
        "client.toolbarMode": "viewer",
        "client.showErrorLinks": "false",
        **THEME,
    }
    options = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "streamlit", "run", str(APP), *options]
