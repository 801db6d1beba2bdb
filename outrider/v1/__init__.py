"""Generated messages and stubs of the wire, from proto/outrider/v1. Never edited by hand."""
