"""One frozen backbone, many tasks: their adapters side by side, their images in one batch."""

from vpt_fast.bank.prompt_bank import PromptBank
from vpt_fast.bank.read_task import BankTask

__all__ = ["BankTask", "PromptBank"]
