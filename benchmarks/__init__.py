"""What measures speed; nothing else imports it."""
