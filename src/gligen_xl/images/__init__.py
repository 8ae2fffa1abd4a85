"""Images: decoded from any kind of file, cropped and resized with their boxes, and drawn on."""
