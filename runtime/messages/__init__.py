"""The boundary between the parties: messages, their encoding, and the ledger that counts their bytes."""
