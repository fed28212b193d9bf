package main

import (
	"flag"
	"fmt"
	"net/http"
	"strings"

	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"
)

// Relay is a DERP server over HTTP, plain upgrade and websocket.
func relay(arguments []string) (event, func(order) error, error) {
	flags := flag.NewFlagSet("relay", flag.ContinueOnError)
	strip := flags.Bool("strip", false, "take `Upgrade: DERP` out of requests, as some proxies do")
	if err := flags.Parse(arguments); err != nil {
		return nil, nil, err
	}
	server := derpserver.New(key.NewNode(), logf)
	upgrades := derpserver.AddWebSocketSupport(server, derpserver.Handler(server))
	routes := http.NewServeMux()
	routes.HandleFunc("/derp", func(w http.ResponseWriter, r *http.Request) {
		say(event{"event": "upgrade", "to": r.Header.Get("Upgrade"), "header": r.Header})
		if *strip && strings.EqualFold(r.Header.Get("Upgrade"), "DERP") {
			r.Header.Del("Upgrade")
		}
		upgrades.ServeHTTP(w, r)
		say(event{"event": "left"})
	})
	routes.HandleFunc("/derp/latency-check", func(w http.ResponseWriter, r *http.Request) {
		say(event{"event": "latency_check"})
		derpserver.ProbeHandler(w, r)
	})
	url, err := listen(routes)
	obey := func(order) error { return fmt.Errorf("unknown") }
	return event{"url": url, "key": server.PublicKey().String()}, obey, err
}
