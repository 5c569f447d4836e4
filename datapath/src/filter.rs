//! Filters: eBPF programs that endpoints attach to choose among the messages that are for them (R17, D10).
//!
//! A program is called with `r1` at the first byte of the body. The message passes when it exits with something other than
//! zero. It can compute, look at the body and use 512 bytes of stack; there are no calls, and no loops.
//!
//! Invariants:
//! 1. A program that was taken always ends, after at most as many steps as it has instructions: jumps lead forward only.
//! 2. Whatever a program does, it reads nothing but the body and its own stack, and changes nothing but its stack. Where a
//!    load goes is checked when it happens; a load outside ends the program, and the message does not pass.
//! 3. A program cannot learn an address of the process that runs it: pointers can be moved and read through, not compared, stored,
//!    combined or returned.
//! 4. The interpreter never meets an instruction on which it would panic. It is `rbpf`'s; its own verifier is too lenient for
//!    all of this, and so there is one here, and nothing that it has not passed is ever run.

use std::fmt;

/// The most instructions that a program may have.
pub const MAX_INSTRUCTIONS: usize = 4096;
/// Bytes of one instruction.
const SIZE: usize = 8;
/// Bytes of stack below `r10`.
const STACK: i32 = rbpf::ebpf::STACK_SIZE as i32;
/// The frame pointer, the only register that cannot be written.
const FRAME: usize = 10;
const REGISTERS: usize = 11;

/// Why a program was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilterError {
    /// Number of the instruction, from 0; `None` when the program as a whole is at fault.
    pub at: Option<usize>,
    /// What is wrong with it.
    pub why: &'static str,
}

impl fmt::Display for FilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            Some(at) => write!(f, "filter: instruction {at}: {}", self.why),
            None => write!(f, "filter: {}", self.why),
        }
    }
}

impl std::error::Error for FilterError {}

/// A program that was found harmless.
#[derive(Debug, Clone)]
pub struct Filter {
    program: Box<[u8]>,
}

impl Filter {
    /// Takes a program: instructions of 8 bytes, little endian, as in the kernel.
    ///
    /// # Errors
    /// [`FilterError`] names the first instruction that may not be there, and why.
    pub fn new(program: &[u8]) -> Result<Self, FilterError> {
        verify(program)?;
        let mut program: Box<[u8]> = program.into();
        for code in program.chunks_exact_mut(SIZE) {
            // The interpreter's negation overflows for the least number; a multiplication by -1 does not, and is the same.
            if code[0] == rbpf::ebpf::NEG64 {
                code[0] = rbpf::ebpf::MUL64_IMM;
                code[4..8].fill(0xff);
            }
        }
        // A second opinion; it also makes sure that the interpreter will take what is handed to it at each message.
        if rbpf::EbpfVmRaw::new(Some(&program)).is_err() {
            return Err(whole("the interpreter does not take it"));
        }
        Ok(Self { program })
    }

    /// Whether a message with this body passes. A program that goes wrong lets nothing pass. The body is not changed.
    #[must_use]
    pub fn passes(&self, body: &mut [u8]) -> bool {
        // The machine borrows its program, so it is made anew each time; without a second verification that costs little.
        let Ok(mut vm) = rbpf::EbpfVmRaw::new(None) else {
            return false;
        };
        if vm.set_verifier(|_| Ok(())).is_err() || vm.set_program(&self.program).is_err() {
            return false;
        }
        vm.execute_program(body).is_ok_and(|result| result != 0)
    }
}

fn whole(why: &'static str) -> FilterError {
    FilterError { at: None, why }
}

/// What a register holds when an instruction is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Number,
    Body,
    Stack,
    /// A number on one way here, a pointer on another: not to be touched.
    Unclear,
}

type State = [Holds; REGISTERS];

/// One instruction, taken apart.
#[derive(Debug, Clone, Copy)]
struct Code {
    op: u8,
    dst: usize,
    src: usize,
    off: i32,
    imm: i32,
}

impl Code {
    fn read(b: &[u8]) -> Self {
        Self {
            op: b[0],
            dst: usize::from(b[1] & 15),
            src: usize::from(b[1] >> 4),
            off: i16::from_le_bytes([b[2], b[3]]).into(),
            imm: i32::from_le_bytes([b[4], b[5], b[6], b[7]]),
        }
    }

    fn class(self) -> u8 {
        self.op & 7
    }

    /// The operation of arithmetic and jumps, without class and source.
    fn operation(self) -> u8 {
        self.op & 0xf0
    }

    /// Whether the second operand is a register.
    fn by_register(self) -> bool {
        self.op & rbpf::ebpf::BPF_X != 0
    }

    /// Bytes that a load or store moves.
    fn bytes(self) -> i32 {
        match self.op & 0x18 {
            rbpf::ebpf::BPF_W => 4,
            rbpf::ebpf::BPF_H => 2,
            rbpf::ebpf::BPF_B => 1,
            _ => 8,
        }
    }

    fn in_stack(self) -> bool {
        (-STACK..=-self.bytes()).contains(&self.off)
    }
}

fn verify(program: &[u8]) -> Result<(), FilterError> {
    if program.len() > MAX_INSTRUCTIONS * SIZE {
        return Err(whole("more than 4096 instructions"));
    }
    if !program.len().is_multiple_of(SIZE) {
        return Err(whole("not a whole number of instructions of 8 bytes"));
    }
    let codes: Vec<Code> = program.chunks_exact(SIZE).map(Code::read).collect();
    match codes.last() {
        None => return Err(whole("no instructions")),
        Some(last) if last.op != rbpf::ebpf::EXIT => {
            return Err(FilterError {
                at: Some(codes.len() - 1),
                why: "the last instruction is not an exit",
            });
        }
        Some(_) => {}
    }
    // Which places cannot be jumped to, and what the registers hold at each place that can be reached.
    let mut second_half = vec![false; codes.len()];
    let mut skip = false;
    for (at, code) in codes.iter().enumerate() {
        second_half[at] = skip;
        skip = !skip && code.op == rbpf::ebpf::LD_DW_IMM;
    }
    let mut states: Vec<Option<State>> = vec![None; codes.len()];
    let mut first = [Holds::Number; REGISTERS];
    first[1] = Holds::Body;
    first[FRAME] = Holds::Stack;
    states[0] = Some(first);
    for at in 0..codes.len() {
        if second_half[at] {
            continue;
        }
        let code = codes[at];
        let refuse = |why| FilterError { at: Some(at), why };
        known(code, codes.get(at + 1)).map_err(refuse)?;
        let target = if jumps(code) {
            Some(jump_target(at, code, &second_half).map_err(refuse)?)
        } else {
            None
        };
        // What cannot be reached is never run.
        let Some(mut state) = states[at] else {
            continue;
        };
        step(code, &mut state).map_err(refuse)?;
        if let Some(target) = target {
            meet(&mut states[target], &state);
        }
        let goes_on = code.op != rbpf::ebpf::JA && code.op != rbpf::ebpf::EXIT;
        if goes_on {
            let next = at + 1 + usize::from(code.op == rbpf::ebpf::LD_DW_IMM);
            match states.get_mut(next) {
                Some(place) => meet(place, &state),
                None => return Err(refuse("the program runs over its end")),
            }
        }
    }
    Ok(())
}

/// Whether there is such an instruction, with registers and constants that it can have.
fn known(code: Code, next: Option<&Code>) -> Result<(), &'static str> {
    use rbpf::ebpf::{
        BE, BPF_ALU, BPF_ALU64, BPF_ARSH, BPF_END, BPF_JA, BPF_JMP, BPF_JMP32, BPF_JSLE, BPF_LD,
        BPF_LDX, BPF_MEM, BPF_NEG, BPF_ST, BPF_STX, CALL, EXIT, JA, LD_DW_IMM, LE, TAIL_CALL,
    };
    if code.dst > FRAME || code.src > FRAME {
        return Err("there is no such register");
    }
    let writes = match code.class() {
        BPF_LD if code.op == LD_DW_IMM => {
            if code.src != 0 {
                return Err("constants that name maps or functions are not known here");
            }
            match next {
                Some(half) if half.op == 0 && half.dst == 0 && half.src == 0 && half.off == 0 => {}
                _ => return Err("the second half of the constant is missing"),
            }
            true
        }
        // What there is of them in the interpreter is neither the kernel's byte order nor its bounds.
        BPF_LD => return Err("absolute and indirect packet loads are not known; load through r1"),
        BPF_LDX if code.op & 0xe0 == BPF_MEM => true,
        BPF_ST | BPF_STX if code.op & 0xe0 == BPF_MEM => {
            if code.dst != FRAME {
                return Err("stores go to the stack only, through r10");
            }
            if !code.in_stack() {
                return Err("the store is outside the stack");
            }
            false
        }
        BPF_ALU if code.op == LE || code.op == BE => {
            if !matches!(code.imm, 16 | 32 | 64) {
                return Err("bytes can be swapped in 16, 32 or 64 bits");
            }
            true
        }
        BPF_ALU | BPF_ALU64
            if code.operation() <= BPF_ARSH
                && (code.operation() != BPF_NEG || !code.by_register()) =>
        {
            debug_assert_ne!(code.operation(), BPF_END);
            true
        }
        BPF_JMP if code.op == CALL || code.op == TAIL_CALL => {
            return Err("there is nothing to call");
        }
        BPF_JMP if code.op == JA || code.op == EXIT => false,
        BPF_JMP | BPF_JMP32
            if code.operation() != BPF_JA
                && code.operation() <= BPF_JSLE
                && code.operation() != CALL & 0xf0
                && code.operation() != EXIT & 0xf0 =>
        {
            false
        }
        _ => return Err("there is no such instruction"),
    };
    if writes && code.dst == FRAME {
        return Err("r10 cannot be written");
    }
    Ok(())
}

fn jumps(code: Code) -> bool {
    matches!(code.class(), rbpf::ebpf::BPF_JMP | rbpf::ebpf::BPF_JMP32)
        && code.op != rbpf::ebpf::EXIT
}

fn jump_target(at: usize, code: Code, second_half: &[bool]) -> Result<usize, &'static str> {
    let Ok(off) = usize::try_from(code.off) else {
        return Err("the jump leads back: loops are not allowed");
    };
    match second_half.get(at + 1 + off) {
        None => Err("the jump leads out of the program"),
        Some(true) => Err("the jump leads into the middle of a constant"),
        Some(false) => Ok(at + 1 + off),
    }
}

/// What the registers hold after an instruction, if it may do what it does with what they hold before.
fn step(code: Code, state: &mut State) -> Result<(), &'static str> {
    use rbpf::ebpf::{
        ADD64_IMM, ADD64_REG, BPF_ALU, BPF_ALU64, BPF_END, BPF_JMP, BPF_JMP32, BPF_LD, BPF_LDX,
        BPF_MOV, BPF_STX, EXIT, JA, MOV64_REG, SUB64_IMM, SUB64_REG,
    };
    let number = |register: usize| match state[register] {
        Holds::Number => Ok(()),
        Holds::Unclear => Err("a register holds a number or a pointer, depending on the way here"),
        Holds::Body | Holds::Stack => Err("a pointer is used as a number"),
    };
    let after = match code.class() {
        BPF_LD => Holds::Number,
        BPF_LDX => {
            if !matches!(state[code.src], Holds::Body | Holds::Stack) {
                return Err("a load through something that is not a pointer");
            }
            if code.src == FRAME && !code.in_stack() {
                return Err("the load is outside the stack");
            }
            Holds::Number
        }
        BPF_STX => return number(code.src),
        BPF_ALU | BPF_ALU64 => match (code.op, state[code.dst], state[code.src]) {
            (MOV64_REG, _, from) if from != Holds::Unclear => from,
            (ADD64_IMM | SUB64_IMM, to @ (Holds::Body | Holds::Stack), _) => to,
            (ADD64_REG | SUB64_REG, to @ (Holds::Body | Holds::Stack), Holds::Number) => to,
            (ADD64_REG, Holds::Number, from @ (Holds::Body | Holds::Stack)) => from,
            _ => {
                if code.operation() != BPF_MOV {
                    number(code.dst)?;
                }
                // The byte swaps use that bit for something else.
                if code.by_register() && code.operation() != BPF_END {
                    number(code.src)?;
                }
                Holds::Number
            }
        },
        BPF_JMP if code.op == JA => return Ok(()),
        BPF_JMP if code.op == EXIT => return number(0),
        BPF_JMP | BPF_JMP32 => {
            number(code.dst)?;
            return if code.by_register() {
                number(code.src)
            } else {
                Ok(())
            };
        }
        // Stores of constants change no register.
        _ => return Ok(()),
    };
    state[code.dst] = after;
    Ok(())
}

/// Another way leads to this place.
fn meet(place: &mut Option<State>, state: &State) {
    match place {
        None => *place = Some(*state),
        Some(known) => {
            for (have, new) in known.iter_mut().zip(state) {
                if have != new {
                    *have = Holds::Unclear;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    fn i(op: u8, dst: u8, src: u8, off: i16, imm: i32) -> [u8; 8] {
        let (off, imm) = (off.to_le_bytes(), imm.to_le_bytes());
        [
            op,
            dst | src << 4,
            off[0],
            off[1],
            imm[0],
            imm[1],
            imm[2],
            imm[3],
        ]
    }
    const LDXB: u8 = 0x71;
    const LDXDW: u8 = 0x79;
    const MOV: u8 = 0xb7;
    const MOVX: u8 = 0xbf;
    const ADDX: u8 = 0x0f;
    const JNE: u8 = 0x55;
    const JA: u8 = 0x05;
    const LDDW: u8 = 0x18;

    fn exit() -> [u8; 8] {
        i(0x95, 0, 0, 0, 0)
    }

    fn refused(program: &[[u8; 8]]) -> FilterError {
        Filter::new(&program.concat()).unwrap_err()
    }

    fn run(program: &[[u8; 8]], body: &[u8]) -> bool {
        Filter::new(&program.concat())
            .unwrap()
            .passes(&mut body.to_vec())
    }

    fn begins_with(byte: u8) -> Vec<[u8; 8]> {
        vec![
            i(LDXB, 2, 1, 0, 0),
            i(MOV, 0, 0, 0, 0),
            i(JNE, 2, 0, 1, byte.into()),
            i(MOV, 0, 0, 0, 1),
            exit(),
        ]
    }

    #[test]
    fn r17_a_filter_chooses_by_the_first_byte() {
        let filter = Filter::new(&begins_with(b'x').concat()).unwrap();
        for (body, want) in [
            (&b"x"[..], true),
            (b"xyz", true),
            (b"yx", false),
            (b"", false),
            (b"\0", false),
        ] {
            let mut copy = body.to_vec();
            assert_eq!(filter.passes(&mut copy), want, "{body:?}");
            assert_eq!(copy, body);
        }
    }

    #[test]
    fn r17_the_stack_holds_what_was_stored() {
        // *(u64 *)(r10 - 512) = 7; exit *(u64 *)(r10 - 512) == 7
        let program = [
            i(0x7a, 10, 0, -512, 7),
            i(LDXDW, 3, 10, -512, 0),
            i(MOV, 0, 0, 0, 0),
            i(JNE, 3, 0, 1, 7),
            i(MOV, 0, 0, 0, 1),
            exit(),
        ];
        assert!(run(&program, b""));
    }

    #[test]
    fn case45_endless_loops_are_refused() {
        let error = refused(&[i(JA, 0, 0, -1, 0), exit()]);
        assert_eq!(error.at, Some(0));
        assert_eq!(
            error.to_string(),
            "filter: instruction 0: the jump leads back: loops are not allowed"
        );
        assert!(
            refused(&[i(MOV, 2, 0, 0, 0), i(JNE, 2, 0, -2, 1), exit()])
                .why
                .contains("loops")
        );
        assert_eq!(
            refused(&[i(MOV, 0, 0, 0, 0), i(JA, 0, 0, i16::MIN, 0), exit()]).at,
            Some(1)
        );
    }

    #[test]
    fn case45_jumps_stay_inside_and_between_instructions() {
        assert!(
            refused(&[i(JA, 0, 0, 1, 0), exit()])
                .why
                .contains("out of the program")
        );
        assert!(
            refused(&[i(JA, 0, 0, i16::MAX, 0), exit()])
                .why
                .contains("out of the program")
        );
        let program = [
            i(JA, 0, 0, 1, 0),
            i(LDDW, 0, 0, 0, 5),
            i(0, 0, 0, 0, 5),
            exit(),
        ];
        assert!(refused(&program).why.contains("middle of a constant"));
        // The second half of a constant is no instruction, whatever it looks like, and a constant is never cut off.
        assert!(
            refused(&[i(LDDW, 0, 0, 0, 5), exit()])
                .why
                .contains("second half")
        );
    }

    #[test]
    fn case45_big_and_odd_programs_are_refused() {
        assert_eq!(
            Filter::new(&vec![0x95; 1 << 20]).unwrap_err().why,
            "more than 4096 instructions"
        );
        let mut long = vec![i(MOV, 0, 0, 0, 1); MAX_INSTRUCTIONS];
        long.push(exit());
        assert!(Filter::new(&long.concat()).is_err());
        assert!(Filter::new(&long[1..].concat()).is_ok());
        assert_eq!(Filter::new(&[]).unwrap_err().why, "no instructions");
        assert!(Filter::new(&exit()[..7]).is_err());
        assert!(refused(&[i(MOV, 0, 0, 0, 1)]).why.contains("exit"));
    }

    #[test]
    fn case45_loads_outside_are_refused_or_let_nothing_pass() {
        assert!(
            refused(&[i(LDXB, 0, 10, 0, 0), exit()])
                .why
                .contains("outside the stack")
        );
        assert!(
            refused(&[i(LDXDW, 0, 10, -7, 0), exit()])
                .why
                .contains("outside the stack")
        );
        assert!(
            refused(&[i(LDXB, 0, 10, -513, 0), exit()])
                .why
                .contains("outside the stack")
        );
        assert!(
            refused(&[i(LDXB, 0, 2, 0, 0), exit()])
                .why
                .contains("not a pointer")
        );
        let load = |off| [i(LDXDW, 0, 1, off, 0), i(MOV, 0, 0, 0, 1), exit()];
        assert!(run(&load(0), &[0; 8]));
        for off in [1, 8, -1, -8, i16::MAX, i16::MIN] {
            assert!(!run(&load(off), &[0; 8]), "{off}");
        }
        assert!(!run(&load(0), b""));
        // The address wraps around the end of memory, and comes to nothing that could be read.
        for distance in [u64::MAX, 1 << 63, u64::MAX - 7, 1 << 32] {
            let program = [
                i(LDDW, 2, 0, 0, distance as i32),
                i(0, 0, 0, 0, (distance >> 32) as i32),
                i(ADDX, 1, 2, 0, 0),
                i(LDXDW, 0, 1, 0, 0),
                i(MOV, 0, 0, 0, 1),
                exit(),
            ];
            assert!(!run(&program, &[0; 8]), "{distance:#x}");
        }
    }

    #[test]
    fn case45_stores_go_to_the_stack_only() {
        for op in [0x62, 0x6a, 0x72, 0x7a, 0x63, 0x6b, 0x73, 0x7b] {
            assert!(
                refused(&[i(op, 1, 0, 0, 0), exit()])
                    .why
                    .contains("stack only"),
                "{op:#x}"
            );
            assert!(
                refused(&[i(op, 10, 0, 0, 0), exit()])
                    .why
                    .contains("outside"),
                "{op:#x}"
            );
            assert!(
                refused(&[i(op, 10, 0, -513, 0), exit()])
                    .why
                    .contains("outside"),
                "{op:#x}"
            );
        }
        assert!(
            refused(&[i(MOV, 10, 0, 0, 0), exit()])
                .why
                .contains("r10 cannot be written")
        );
        assert!(
            refused(&[i(LDXB, 10, 1, 0, 0), exit()])
                .why
                .contains("r10 cannot be written")
        );
    }

    #[test]
    fn case45_there_is_nothing_to_call_and_no_unknown_instruction() {
        for (op, src) in [(0x85, 0), (0x85, 1), (0x8d, 0)] {
            assert!(
                refused(&[i(op, 0, src, 0, 0), exit()])
                    .why
                    .contains("nothing to call")
            );
        }
        // Atomic addition, loads of packets, swaps by an odd width, registers that do not exist.
        for code in [
            i(0xc3, 10, 0, -8, 0),
            i(0xdb, 10, 0, -8, 0),
            i(0x30, 0, 0, 0, 0),
            i(0x50, 0, 0, 0, 0),
            i(0xd4, 0, 0, 0, 8),
            i(MOV, 11, 0, 0, 0),
            i(MOVX, 0, 15, 0, 0),
            i(0x8f, 0, 0, 0, 0),
        ] {
            assert_eq!(refused(&[code, exit()]).at, Some(0), "{code:?}");
        }
        for op in 0..=255u8 {
            // Whatever is taken can be run.
            let program = [i(op, 0, 0, 0, 16), exit()].concat();
            if let Ok(filter) = Filter::new(&program) {
                let _ = filter.passes(&mut [1, 2, 3]);
            }
        }
    }

    #[test]
    fn case45_pointers_are_no_numbers() {
        // r0 = r1; r1 < r2; the stack as a place to launder; a difference of pointers; one bit of a pointer as an offset.
        for program in [
            vec![i(MOVX, 0, 1, 0, 0), exit()],
            vec![i(0x2d, 1, 2, 0, 0), exit()],
            vec![i(0x25, 10, 0, 0, 7), exit()],
            vec![i(0x7b, 10, 1, -8, 0), exit()],
            vec![i(MOVX, 2, 10, 0, 0), i(0x1f, 2, 1, 0, 0), exit()],
            vec![i(0x57, 1, 0, 0, 1), exit()],
            vec![i(0xbc, 2, 1, 0, 0), exit()],
            vec![i(0x0c, 1, 2, 0, 0), exit()],
        ] {
            assert!(
                refused(&program)
                    .why
                    .contains("pointer is used as a number"),
                "{program:?}"
            );
        }
        // On one way r2 is a pointer, on the other a number.
        let program = [
            i(MOV, 2, 0, 0, 0),
            i(JNE, 2, 0, 1, 0),
            i(MOVX, 2, 1, 0, 0),
            i(MOVX, 0, 2, 0, 0),
            exit(),
        ];
        assert!(refused(&program).why.contains("depending on the way"));
    }

    #[test]
    fn case45_arithmetic_never_panics() {
        let (low, high) = (i(LDDW, 0, 0, 0, 0), i(0, 0, 0, 0, i32::MIN));
        // The least number negated; divisions and remainders by nothing.
        assert!(run(&[low, high, i(0x87, 0, 0, 0, 0), exit()], b""));
        assert!(run(
            &[
                i(MOV, 0, 0, 0, 5),
                i(0x87, 0, 0, 0, 0),
                i(0x07, 0, 0, 0, 6),
                exit()
            ],
            b""
        ));
        for op in [0x34, 0x3c, 0x37, 0x3f] {
            assert!(
                !run(&[i(MOV, 0, 0, 0, 5), i(op, 0, 2, 0, 0), exit()], b""),
                "{op:#x}"
            );
        }
        for op in [0x94, 0x9c, 0x97, 0x9f] {
            assert!(
                run(&[i(MOV, 0, 0, 0, 5), i(op, 0, 2, 0, 0), exit()], b""),
                "{op:#x}"
            );
        }
    }

    #[test]
    fn case45_the_longest_program_takes_no_millisecond() {
        let mut program = vec![i(LDXDW, 2, 1, 0, 0); MAX_INSTRUCTIONS - 2];
        program.extend([i(MOV, 0, 0, 0, 1), exit()]);
        let filter = Filter::new(&program.concat()).unwrap();
        let mut body = vec![0; 1 << 16];
        // The least of some runs: others use the machine too.
        let took = (0..20)
            .map(|_| {
                let begin = Instant::now();
                assert!(filter.passes(&mut body));
                begin.elapsed()
            })
            .min()
            .unwrap();
        // Without optimization all is slower by an order of magnitude.
        let bar = Duration::from_millis(if cfg!(debug_assertions) { 10 } else { 1 });
        assert!(took <= bar, "{took:?}");
    }

    /// Instructions that are mostly such as exist, so that many programs are taken.
    fn code() -> impl Strategy<Value = [u8; 8]> {
        let op = prop_oneof![
            8 => prop::sample::select(vec![0x07u8, 0x0f, 0x17, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x47, 0x4f, 0x57, 0x5f, 0x67, 0x6f,
                0x77, 0x7f, 0x87, 0x97, 0x9f, 0xa7, 0xaf, 0xb7, 0xbf, 0xc7, 0xcf, 0x04, 0x0c, 0x14, 0x1c, 0x24, 0x2c, 0x34, 0x3c,
                0x64, 0x6c, 0x74, 0x7c, 0x84, 0x94, 0x9c, 0xb4, 0xbc, 0xc4, 0xcc, 0xd4, 0xdc]),
            4 => prop::sample::select(vec![0x61u8, 0x69, 0x71, 0x79, 0x62, 0x6a, 0x72, 0x7a, 0x63, 0x6b, 0x73, 0x7b]),
            3 => prop::sample::select(vec![0x05u8, 0x15, 0x1d, 0x25, 0x2d, 0x45, 0x4d, 0x65, 0x6d, 0x16, 0x1e, 0xa6, 0xae, 0xd6, 0xde, 0x95]),
            1 => any::<u8>(),
        ];
        let off = prop_oneof![3 => 0i16..4, 2 => -16i16..0, 1 => any::<i16>()];
        let imm = prop_oneof![Just(0), Just(16), Just(-1), Just(i32::MIN), any::<i32>()];
        let register = prop_oneof![6 => 0u8..10, 1 => Just(10u8), 1 => 0u8..16];
        (op, register.clone(), register, off, imm).prop_map(|(op, mut dst, src, off, imm)| {
            // A store through anything but r10 is refused anyway.
            if matches!(op & 7, 2 | 3) {
                dst = 10;
            }
            i(op, dst, src, off, imm)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn case45_any_program_is_refused_or_runs_and_ends(codes in prop::collection::vec(code(), 1..14),
                                                          body in prop::collection::vec(any::<u8>(), 0..24)) {
            let mut program = codes;
            program.push(exit());
            if let Ok(filter) = Filter::new(&program.concat()) {
                let mut copy = body.clone();
                let passed = filter.passes(&mut copy);
                prop_assert_eq!(&copy, &body);
                prop_assert_eq!(filter.passes(&mut copy), passed);
            }
        }

        #[test]
        fn case45_any_bytes_are_refused_or_run_and_end(mut bytes in prop::collection::vec(any::<u8>(), 0..80), body in any::<[u8; 9]>()) {
            bytes.truncate(bytes.len() / 8 * 8);
            bytes.extend(exit());
            if let Ok(filter) = Filter::new(&bytes) {
                let _ = filter.passes(&mut body.clone());
            }
        }
    }
}
