//! What a session waits for, and for how long at most.

use super::*;

/// The manager takes no answer for a while, and what it asked for is done all the same.
///
/// Conforms: vpn:T4
#[tokio::test(start_paused = true)]
async fn a_wake_is_passed_on_once_before_it_is_answered() {
    let mut rig = Rig::started().await;
    let mut heard = ears(&rig.net().await.coordinator).await;
    let filler = || vpn::TunnelMessage { rpc: None, msg: Some(woken()) };
    while rig.deps.stream.speaker().try_notify(filler()).is_ok() {
        tokio::task::yield_now().await;
    }
    rig.send(2, wake()).await;
    let passed_on = tokio::time::timeout(PATIENCE, heard.recv()).await.expect("the wake is passed on");
    let is_wake = matches!(passed_on, Some(coordinator::Message::Wake(coordinator::Cause::Manager)));
    assert!(is_wake, "{passed_on:?}");
    loop {
        let message = rig.frame().await;
        if message.rpc.is_some() {
            assert_eq!(message, answer(2, woken()));
            break;
        }
    }
    assert!(heard.try_recv().is_err(), "once");
}

/// Conforms: vpn:15.16
#[tokio::test(start_paused = true)]
async fn settings_that_nobody_answers_fail_the_start_and_not_the_process() {
    let mut rig = Rig::new().await;
    rig.send(1, start(DESCRIPTOR)).await;
    let net = rig.net().await;
    net.link.claim().unwrap().set(UP);
    net.interface.claim().unwrap().set(Some(interface(1280)));
    rig.settings_request().await;
    let response = rig.start_response(1).await;
    assert!(!response.success && !response.error_message.is_empty(), "{response:?}");
    rig.send(2, wake()).await;
    assert_eq!(rig.frame().await, answer(2, woken()));
    rig.start_up(3).await;
}
