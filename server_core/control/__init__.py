"""ControlService, a module per kind of thing that operators work with; `service` puts them together."""
