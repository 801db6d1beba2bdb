"""The bus: tells those who watch something that it has changed. Drivers: `local`, within one process."""
