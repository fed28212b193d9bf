package main

import (
	"fmt"
	"net/netip"

	"tailscale.com/net/stun"
)

// Questions reads and writes the packets of STUN, one an order.
func questions([]string) (event, func(order) error, error) {
	obey := func(given order) error {
		switch given.Order {
		case "ask":
			id := stun.NewTxID()
			say(event{"event": "asked", "id": id[:], "bytes": stun.Request(id)})
		case "answer":
			id, err := stun.ParseBindingRequest(given.Bytes)
			if err != nil {
				return err
			}
			address, err := netip.ParseAddrPort(given.Address)
			if err != nil {
				return err
			}
			say(event{"event": "answered", "id": id[:], "bytes": stun.Response(id, address)})
		case "read":
			id, address, err := stun.ParseResponse(given.Bytes)
			if err != nil {
				return err
			}
			say(event{"event": "read", "id": id[:], "address": address.String()})
		default:
			return fmt.Errorf("unknown")
		}
		return nil
	}
	return event{}, obey, nil
}
