//! The line with which a connection begins: read byte by byte, judged, negotiated, written again.
#![no_main]

use warren_fuzz::Input;
use warren_proto::header::{HeaderError, LineReader, MAX_LINE, Role, SUPPORTED, line, parse_line};

warren_fuzz::target!(check);

const ROLES: [Role; 4] = [Role::Manager, Role::Tunnel, Role::Service, Role::Client];

fn check(data: &[u8]) {
    let mut input = Input::new(data);
    let expected = ROLES[usize::from(input.byte() & 3)];
    let stream = input.rest();
    let mut reader = LineReader::default();
    for (index, byte) in stream.iter().enumerate() {
        match reader.push(*byte) {
            Ok(None) => assert!(index + 1 < MAX_LINE),
            Ok(Some(read)) => {
                assert_eq!(read, stream[..index], "the line is all that came before its end");
                return judge(&read, expected);
            }
            Err(HeaderError::TooLong(read)) => {
                assert_eq!(read, stream[..MAX_LINE]);
                return;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn judge(read: &[u8], expected: Role) {
    match parse_line(read, expected) {
        Ok(theirs) => {
            let written = line(expected, &theirs);
            assert_eq!(parse_line(written.trim_end().as_bytes(), expected), Ok(theirs.clone()));
            let (a, b) = (SUPPORTED.negotiate(&theirs), theirs.negotiate(&SUPPORTED));
            assert_eq!(a.clone().ok(), b.ok(), "both ends come to the same version");
            assert!(
                a.is_ok_and(|version| version.major == 1)
                    || !theirs.versions().iter().any(|it| it.major == 1)
            );
            for other in ROLES.into_iter().filter(|role| *role != expected) {
                assert_eq!(parse_line(read, other), Err(HeaderError::Role));
            }
        }
        Err(error) => assert!(error.to_string().len() < 16 * MAX_LINE),
    }
}
