"""What tables cost before they are there: memory, bytes on the wire, what does not fit."""
