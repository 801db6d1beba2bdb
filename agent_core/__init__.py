"""The agent: sessions, journal, runner, volumes, containers and the plugin host of one node."""
