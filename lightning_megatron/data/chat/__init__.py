"""Chats: conversations become tokens by a chat template, and the assistant's answers are learnt."""
