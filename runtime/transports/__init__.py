"""How bytes move between processes: one file per transport, chosen by name or ``auto``."""

from gossamer.runtime.transports.base import Pending, Transport
from gossamer.runtime.transports.select import TRANSPORTS, detect_launcher, open_transport

__all__ = ["TRANSPORTS", "Pending", "Transport", "detect_launcher", "open_transport"]
