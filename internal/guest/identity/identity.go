// Package identity is who this guest is: it applies the one batched message
// that a machine gets at boot and after every restore, holds the result for
// the rest of the agent, and serves agentiso.guest.v1.Guest, what the host
// asks of a guest as a machine.
package identity
