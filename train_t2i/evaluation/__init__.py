"""The parts of ``evaluate``: whose images are scored, what is measured of them, the table, the pairs, the sheet to vote on."""
