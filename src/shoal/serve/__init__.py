"""Public protocols: bytes in, requests past the door, text and events out.  The only room that knows HTTP."""
